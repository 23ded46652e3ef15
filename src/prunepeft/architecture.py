"""An architecture that is given instead of a search: read, and checked against the base model."""

from pathlib import Path

from prunepeft.errors import ConfigError
from prunepeft.space import Placement, Site
from prunepeft.state import read_json


def read_architecture(path: str) -> Placement:
    """Placement of an `arch.json`, or of the run folder that holds one."""
    file = Path(path)
    if file.is_dir():
        file = next(
            (f for f in (file / "best" / "arch.json", file / "arch.json") if f.is_file()), file
        )
    if not file.is_file():
        raise ConfigError(
            f"arch {path!r} is no arch.json and no run folder that holds one; give either."
        )
    return Placement.from_dict(read_json(file))


def check_fits(given: Placement, sites: tuple[Site, ...]) -> None:
    """Raise ConfigError if a given architecture is of a base model of other widths."""
    widths = {s.path: (s.d_in, s.d_out) for s in sites}
    for site in (site for slot in given for site in slot.sites):
        found = widths.get(site.path)
        if found != (site.d_in, site.d_out):
            there = f"one of {found[0]} to {found[1]}" if found else "no such layer"
            raise ConfigError(
                f"the given architecture has a module on {site.path}, of {site.d_in} to "
                f"{site.d_out} features; this model has {there}. Give the base model it was made "
                "on: if its run cut the base, that is the folder base/ of the run (model=RUN/base)."
            )
