"""Pure policy: where requests go and why. Time and state come in as data; decisions go out with reasons."""
