"""What is a secret, for all that must not show one."""

import re

SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|ACCESS_KEY|PRIVATE_KEY|API_KEY", re.IGNORECASE)
"""Matches the names of environment variables that hold secrets: no spec may use one, no log shows its value."""
