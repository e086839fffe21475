"""Brute force in float64, one entry at a time: what each merging method has to give.

Written from the published description alone. `updates` maps a module's name to an array (task,
out, in); all modules together are one long vector a task. Every oracle returns the same form.
"""

import numpy as np


def flatten(updates):
    """One vector of all modules' entries for each task."""
    tasks = len(next(iter(updates.values())))
    vectors = [
        np.concatenate(
            [np.asarray(deltas[t], dtype=np.float64).ravel() for deltas in updates.values()]
        )
        for t in range(tasks)
    ]
    return vectors


def unflatten(updates, vectors):
    merged, start = {}, 0
    for name, deltas in updates.items():
        end = start + deltas[0].size
        merged[name] = np.stack([v[start:end].reshape(deltas[0].shape) for v in vectors])
        start = end
    return merged


def average(updates):
    vectors = flatten(updates)
    merged = np.array([sum(entries) / len(entries) for entries in zip(*vectors)])
    return unflatten(updates, [merged] * len(vectors))


def task_arithmetic(updates, scale):
    vectors = flatten(updates)
    merged = np.array([scale * sum(entries) for entries in zip(*vectors)])
    return unflatten(updates, [merged] * len(vectors))


def ties(updates, density, scale):
    vectors = flatten(updates)
    trimmed = []
    for vector in vectors:
        k = int(len(vector) * (1 - density))
        threshold = sorted(abs(vector))[k - 1] if k > 0 else 0.0
        trimmed.append([entry if abs(entry) >= threshold else 0.0 for entry in vector])

    signs = []
    for entries in zip(*trimmed):
        total = sum(entries)
        signs.append(1 if total > 0 else -1 if total < 0 else 0)
    balance = sum(signs)
    majority = 1 if balance > 0 else -1 if balance < 0 else 0

    merged = []
    for entries, sign in zip(zip(*trimmed), signs):
        if sign == 0:
            sign = majority
        agreeing = [entry for entry in entries if entry * sign > 0]
        merged.append(scale * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return unflatten(updates, [np.array(merged)] * len(vectors))


def emr(updates):
    vectors = flatten(updates)
    tasks, size = len(vectors), len(vectors[0])
    masked = np.zeros((tasks, size))
    for p in range(size):
        entries = [vector[p] for vector in vectors]
        gamma = 1 if sum(entries) / tasks > 0 else -1
        agreeing = [abs(entry) for entry in entries if entry * gamma > 0]
        for t, entry in enumerate(entries):
            if entry * gamma > 0:
                masked[t, p] = gamma * max(agreeing)

    received = []
    for t in range(tasks):
        own = unified = 0.0
        start = 0
        for deltas in updates.values():
            end = start + deltas[0].size
            own += sum(abs(vectors[t][start:end])) / (end - start)
            unified += sum(abs(masked[t, start:end])) / (end - start)
            start = end
        received.append(masked[t] * (own / unified) if unified > 0 else np.zeros(size))
    return unflatten(updates, received)
