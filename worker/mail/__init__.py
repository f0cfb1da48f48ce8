"""Mail: rendering it, and handing it to a relay."""
