"""Brute force in float64, one entry at a time: what each merging method has to give.

Written from the published description alone: plain loops, and decompositions of whole dense
matrices. `updates` maps a module's name to an array (task, out, in); all modules together are one
long vector a task. Every oracle returns the same form.
"""

import numpy as np

CUT = 1e-6
"""Singular values of at most so much of the largest count as zero."""


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


def shared(updates, merge_one):
    """`merge_one(name, deltas)` of each module, the same for all tasks."""
    merged = {}
    for name, deltas in updates.items():
        one = merge_one(name, np.asarray(deltas, dtype=np.float64))
        merged[name] = np.stack([one] * len(deltas))
    return merged


def average(updates, weights=None):
    vectors = flatten(updates)
    weights = weights or [1] * len(vectors)
    merged = []
    for entries in zip(*vectors):
        merged.append(sum(w * entry for w, entry in zip(weights, entries)) / sum(weights))
    return unflatten(updates, [np.array(merged)] * len(vectors))


def task_arithmetic(updates, scale, weights=None):
    vectors = flatten(updates)
    weights = weights or [1] * len(vectors)
    merged = []
    for entries in zip(*vectors):
        merged.append(scale * sum(w * entry for w, entry in zip(weights, entries)))
    return unflatten(updates, [np.array(merged)] * len(vectors))


def ties(updates, density, scale, trim="global"):
    if trim == "tensor":
        alone = {name: {name: deltas} for name, deltas in updates.items()}
        return {name: ties(one, density, scale)[name] for name, one in alone.items()}

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


def emr(updates, scale=1.0):
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
        rescaler = scale * own / unified if unified > 0 else 0.0
        received.append(rescaler * masked[t])
    return unflatten(updates, received)


def fisher(updates, information, scale=1.0):
    """`information` has the form of `updates`."""
    vectors, informed = flatten(updates), flatten(information)
    norms = [sum(vector**2) ** 0.5 + 1e-6 for vector in informed]
    merged = []
    for entries, values in zip(zip(*vectors), zip(*informed)):
        importance = [(value + 1e-6) / norm for value, norm in zip(values, norms)]
        weighted = [f * entry for f, entry in zip(importance, entries)]
        merged.append(scale * sum(weighted) / sum(importance))
    return unflatten(updates, [np.array(merged)] * len(vectors))


def second_moment(rows, ridge, off_diagonal):
    """E[h h^T] of the rows h, with a lesser off-diagonal and a ridge."""
    rows = np.asarray(rows, dtype=np.float64)
    moment = sum(np.outer(row, row) for row in rows) / len(rows)
    width = len(moment)
    mean = sum(moment[i, i] for i in range(width)) / width
    for i in range(width):
        for j in range(width):
            if i != j:
                moment[i, j] *= off_diagonal
        moment[i, i] += ridge * mean
    return moment


def regmean(updates, rows, ridge, off_diagonal, scale=1.0):
    """`rows` maps a module's name to an array of inputs for each task."""

    def merge_one(name, deltas):
        moments = [second_moment(each, ridge, off_diagonal) for each in rows[name]]
        weighted = sum(delta @ moment for delta, moment in zip(deltas, moments))
        return scale * weighted @ np.linalg.inv(sum(moments))

    return shared(updates, merge_one)


def svd(matrix):
    """Without the directions of singular value zero."""
    U, values, Vh = np.linalg.svd(matrix, full_matrices=False)
    there = [i for i, value in enumerate(values) if value > CUT * values[0]]
    return U[:, there], values[there], Vh[there]


def polar(columns):
    """The nearest matrix with orthonormal columns, or of as many as the rank of these."""
    P, _, Qh = svd(columns)
    return P @ Qh


def knots_ties(updates, density, scale, trim="global"):
    bases, coordinates = {}, {}
    for name, deltas in updates.items():
        bases[name], _, _ = svd(np.concatenate(list(deltas), axis=1))
        coordinates[name] = np.stack([bases[name].T @ delta for delta in deltas])
    merged = ties(coordinates, density, scale, trim)
    return shared(updates, lambda name, _: bases[name] @ merged[name][0])


def core_space(updates, factors, inner, scale, density=0.2, trim="tensor"):
    """`factors` maps a module's name to [(B, A) of each task], whose products are the updates."""
    left, right, cores = {}, {}, {}
    for name, deltas in updates.items():
        left[name], _, _ = svd(np.concatenate([B for B, _ in factors[name]], axis=1))
        _, _, right[name] = svd(np.concatenate([A for _, A in factors[name]]))
        cores[name] = np.stack([left[name].T @ delta @ right[name].T for delta in deltas])
    if inner == "task_arithmetic":
        merged = task_arithmetic(cores, scale)
    elif inner == "ties":
        merged = ties(cores, density, scale, trim)
    elif inner == "tsv":
        rooms = {name: min(deltas[0].shape) // len(deltas) for name, deltas in updates.items()}
        merged = tsv(cores, scale, rooms)
    return shared(updates, lambda name, _: left[name] @ merged[name][0] @ right[name])


def tsv(updates, scale, rooms=None):
    """`rooms` says how many singular triples of a task count, where it is not for the shape to."""

    def merge_one(name, deltas):
        room = max(1, rooms[name] if rooms else min(deltas[0].shape) // len(deltas))
        left, values, right = [], [], []
        for delta in deltas:
            U, S, Vh = svd(delta)
            left.append(U[:, :room])
            values.append(S[:room])
            right.append(Vh[:room].T)
        U, V = (polar(np.concatenate(each, axis=1)) for each in (left, right))
        return scale * U @ np.diag(np.concatenate(values)) @ V.T

    return shared(updates, merge_one)


def iso_c(updates, scale):
    def merge_one(name, deltas):
        U, values, Vh = svd(sum(deltas))
        mean = sum(values) / max(1, len(values))
        return scale * mean * U @ Vh

    return shared(updates, merge_one)


def iso_cts(updates, scale, common=0.8):
    """Algorithm 2 of the paper, with as many directions as the sum has instead of min(out, in)."""

    def merge_one(name, deltas):
        U, values, Vh = svd(sum(deltas))
        own = round((len(values) - int(common * len(values))) / len(deltas))
        own = min(own, len(values) // len(deltas))
        left = [U[:, : len(values) - own * len(deltas)]]
        right, strengths = [Vh[: left[0].shape[1]].T], [values[: left[0].shape[1]]]
        for delta in deltas:
            rest = delta - left[0] @ left[0].T @ delta
            U, values, Vh = np.linalg.svd(rest, full_matrices=False)
            largest = np.linalg.norm(delta, 2)
            there = [i for i in range(own) if values[i] > CUT * largest]
            left.append(U[:, there])
            strengths.append(values[there])
            right.append(Vh[there].T)
        strengths = np.concatenate(strengths)
        U, V = (polar(np.concatenate(each, axis=1)) for each in (left, right))
        return scale * sum(strengths) / max(1, len(strengths)) * U @ V.T

    return shared(updates, merge_one)
