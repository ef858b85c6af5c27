"""Names of leaves, and rules on names: `a/b/kernel`, regular expressions, first match wins."""

import difflib
import itertools
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax


def path_str(key_path: tuple[Any, ...]) -> str:
    """The name of a leaf: its keys joined by `/`; the trailing `value` of an NNX variable dropped.

    >>> jax.tree_util.tree_flatten_with_path({"Dense_0": {"kernel": 1.0}})[0][0][0]
    (DictKey(key='Dense_0'), DictKey(key='kernel'))
    >>> path_str(_)
    'Dense_0/kernel'
    """
    if len(key_path) > 1 and isinstance(key_path[-1], jax.tree_util.GetAttrKey):
        if key_path[-1].name in ("value", "raw_value"):
            key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_with_paths(tree: Any, is_leaf=None) -> list[tuple[str, Any]]:
    """All leaves of a tree with their names, in flatten order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_str(key_path), leaf) for key_path, leaf in flat]


def refuse_twins(what: str, paths: Iterable[str]) -> None:
    """Raises ValueError if two leaves have one path, as `{"a/b": x, "a": {"b": y}}` has."""
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"{what}: two leaves have the path {path!r}; rename one")
        seen.add(path)


def unique(base: str, taken: Container[str]) -> str:
    """`base`, or the first of `base#1`, `base#2`, ... that is not taken.

    >>> unique("dense", {"dense", "dense#1"})
    'dense#2'
    """
    numbered = itertools.chain([base], (f"{base}#{repeat}" for repeat in itertools.count(1)))
    return next(name for name in numbered if name not in taken)


def near_misses(name: str, candidates: Iterable[str], *, most: int = 3) -> list[str]:
    """The candidates that look most like `name`, best first; case and regex signs do not count."""
    plain = re.sub(r"[^a-z0-9/_]", "", name.lower())
    lowered: dict[str, str] = {}
    for candidate in candidates:
        lowered.setdefault(candidate.lower(), candidate)
    close = difflib.get_close_matches(plain, lowered, n=most, cutoff=0.3)
    close += [c for c in lowered if plain and plain in c and c not in close]
    return [lowered[c] for c in close[:most]]


def match_rules(
    rules: Mapping[str, Any], paths: Iterable[str], *, what: str = "parameter"
) -> dict[str, str | None]:
    """Maps every path to the first rule (a regex that matches the whole path), or to None.

    Raises:
      ValueError: a rule is not a regular expression, or it is the first match of no path; the
        message names the nearest paths (what: what has these paths).

    >>> match_rules({".*kernel": 1, "head/.*": 2}, ["body/kernel", "head/bias", "scale"])
    {'body/kernel': '.*kernel', 'head/bias': 'head/.*', 'scale': None}
    """
    paths = list(paths)
    compiled = {}
    for rule in rules:
        try:
            compiled[rule] = re.compile(rule)
        except re.error as error:
            raise ValueError(f"rule {rule!r} is not a regular expression: {error}") from error
    matched = {
        path: next((rule for rule, regex in compiled.items() if regex.fullmatch(path)), None)
        for path in paths
    }
    for rule in sorted(set(rules) - set(matched.values()), key=list(rules).index):
        shadowed = [path for path in paths if compiled[rule].fullmatch(path)]
        if shadowed:
            raise ValueError(
                f"rule {rule!r} never applies: earlier rules take all it matches, e.g. "
                f"{shadowed[0]!r} goes to {matched[shadowed[0]]!r}; put the narrower rule first"
            )
        nearest = near_misses(rule, paths)
        hint = ", ".join(map(repr, nearest or paths[:3])) or f"there are no {what}s"
        raise ValueError(
            f"rule {rule!r} matches no {what}; nearest: {hint} "
            "(rules are regular expressions that match the whole path)"
        )
    return matched
