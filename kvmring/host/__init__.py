"""VMs seen from outside: recordings of their dirty-ring events, and what follows from them."""
