"""The dashboard in a browser and over HTTP, and the command that takes its screenshots."""
