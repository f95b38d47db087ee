"""What tests share: small models and runs, faults, ranks as processes, a hub."""
