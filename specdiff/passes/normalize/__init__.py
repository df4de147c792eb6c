"""A Dynamo graph in one form: `specialise` to a shape, `normalize`, `rewrite`, `fuse_attention`."""
