"""Networks at work on a GPU, faster than they were trained: nothing here learns, and nothing changes what is saved."""
