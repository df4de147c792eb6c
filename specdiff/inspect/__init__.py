"""For people: drawings and pages of what the compiler decided and what the runtime did."""
