"""A load generator for servers of the OpenAI API: workloads, arrivals, the client, and what it measured."""
