"""The web app: `softvq app`."""
