"""What is timed of networkx: all shortest paths between two corners of a grid that lacks some edges."""

import networkx as nx


def paths(rows, columns, missing):
    graph = nx.grid_2d_graph(rows, columns)
    edges = list(graph.edges)
    graph.remove_edges_from(edges[i % len(edges)] for i in missing)
    try:
        found = list(nx.all_shortest_paths(graph, (0, 0), (rows - 1, columns - 1)))
    except nx.NetworkXNoPath:
        return []
    return [[list(node) for node in path] for path in found[:50]], len(found)
