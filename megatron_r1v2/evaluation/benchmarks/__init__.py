"""The paper's benchmarks: from their published files to our shards, with the paper's prompts."""
