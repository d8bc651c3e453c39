"""Generated from protos/starmesh/v1 at build; only this line is committed."""
