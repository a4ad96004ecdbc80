(() => {
  "use strict";
  document.documentElement.classList.add("js");
  const command = document.getElementById("command");
  if (!command) return;
  const tally = document.getElementById("tally");
  const copy = document.getElementById("copy");
  const recipe = JSON.parse(command.dataset.recipe);
  const ticks = Array.from(document.querySelectorAll("input[data-id]"));
  const idOf = (tick) => JSON.parse(tick.dataset.id);

  // The same rules as compose() in command.py.
  const escaped = (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
  const flag = (name, ids) => {
    if (!ids.length) return "";
    if (ids.every((id) => /^[A-Za-z0-9_][A-Za-z0-9_.:\/@+-]*$/.test(id))) return ` --${name} ${ids.join(",")}`;
    return ` --${name} '${JSON.stringify(ids).replace(/['\u007f-\uffff]/g, escaped)}'`;
  };

  // Ids of earlier rounds stay unless their tick on this page was taken off or turned round.
  const judged = (verdict) => {
    const here = new Set(ticks.map(idOf));
    const ticked = ticks.filter((tick) => tick.checked && tick.dataset.verdict === verdict).map(idOf);
    const carried = recipe[verdict].filter((id) => !here.has(id) || ticked.includes(id));
    return carried.concat(ticked.filter((id) => !carried.includes(id)));
  };

  const compose = () => {
    const keep = judged("keep");
    const drop = judged("drop");
    command.textContent = recipe.head + flag("keep", keep) + flag("drop", drop) + recipe.tail;
    tally.textContent = `${keep.length} to keep, ${drop.length} to drop`;
    copy.disabled = !keep.length && !drop.length;
    copy.textContent = "Copy command";
  };

  for (const tick of ticks) {
    tick.addEventListener("change", () => {
      for (const other of ticks) {
        if (tick.checked && other !== tick && other.dataset.id === tick.dataset.id) other.checked = false;
      }
      compose();
    });
  }

  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command);
      copy.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
    }
  });

  compose();
})();
