"""Fixtures shared by all tests. No test but those of a loopback Hub may reach for a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
