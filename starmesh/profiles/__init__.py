"""Hardware and model profiles: what an instance of a model on an accelerator costs and holds, by name or file.

Owns the profile's fields and its files (one TOML each beside this module). Owns no formula (``policy.cost``) and no
measuring.
"""

from __future__ import annotations

from starmesh.profiles.profile import Link, Profile, ProfileError

__all__ = ["Link", "Profile", "ProfileError"]
