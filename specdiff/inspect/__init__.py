"""What a person looks at: graphs, drawings and pages of what the compiler and the runtime did."""
