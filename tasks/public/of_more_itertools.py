"""What is timed of more-itertools: extremes and permutations by number. Large numbers come as texts."""

from more_itertools import minmax, nth_permutation


def extremes(values, times):
    for _ in range(times):
        found = minmax(values)
        keyed = minmax(values, key=abs)
    return list(found), list(keyed)


def permutations(length, chosen, numbers, times):
    wanted = [int(text) for text in numbers]
    items = range(length)
    for _ in range(times):
        found = [list(nth_permutation(items, chosen, number)) for number in wanted]
    return found
