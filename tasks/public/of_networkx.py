"""What is timed of networkx: shortest paths between two corners of a grid without some edges, several times over."""

import networkx as nx


def paths(rows, columns, missing, times):
    graph = nx.grid_2d_graph(rows, columns)
    edges = list(graph.edges)
    graph.remove_edges_from(edges[i % len(edges)] for i in missing)
    try:
        for _ in range(times):
            found = list(nx.all_shortest_paths(graph, (0, 0), (rows - 1, columns - 1)))
    except nx.NetworkXNoPath:
        return []
    return [str(path) for path in found[:20]], len(found)
