"""What it costs. Each script says in its first lines what it measures, and README.md under which conditions."""
