"""From folders of pictures to batches: shards, their order, the DALI pipeline, and validation folders."""
