from sae_ray import errors


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    drawn = [line.split()[1:] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    defined = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type)}
    assert {name for name, *_ in drawn} == defined.keys() - {"SaeRayError"}
    for name, *says in drawn:
        assert defined[name].__base__ is errors.SaeRayError
        says = " ".join(says)
        assert defined[name].__doc__ == f"{says[0].upper()}{says[1:]}."
