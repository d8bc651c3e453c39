"""Hardware and model profiles: what an instance of a model on an accelerator costs and holds, by name or file.

Owns the profile's fields, its files (one TOML each beside this module) and their derivation from datasheets
(``derive``, ``shipped``). Owns no formula of costs (``policy.cost``) and no measuring (``cli.profile_command``).
"""

from __future__ import annotations

from starmesh.profiles.profile import Link, Profile, ProfileError
from starmesh.profiles.profile_file import load_profile, profile_names, read_profile, write_profile

__all__ = ["Link", "Profile", "ProfileError", "load_profile", "profile_names", "read_profile", "write_profile"]
