"""The packages of the extra that exports and serves."""

from importlib.util import find_spec

from dist_contrastive.config import require


def require_packages(*names: str) -> None:
    """`UserError` where one of the packages `names` of the extra `serve` is missing."""
    missing = [name for name in names if find_spec(name) is None]
    require(
        not missing,
        f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install 'dist_contrastive[serve]'",
    )
