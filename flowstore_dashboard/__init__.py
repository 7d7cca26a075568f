"""The dashboard: pages that show what a store knows. ``flowstore dashboard`` serves them."""
