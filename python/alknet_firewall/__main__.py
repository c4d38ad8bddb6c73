"""``python -m alknet_firewall``."""

from .cli import main

main()
