"""Do what was asked: issue the code, mail it, reply."""
