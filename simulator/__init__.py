"""The simulator: model, workload, graph, lowering, program, timeline, report."""
