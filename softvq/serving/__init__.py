"""Models over HTTP: requests are put together into batches, and what cannot be done in time is refused at once."""
