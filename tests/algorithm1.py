"""Algorithm 1 of the supplement, letter for letter: the ifs, their order, the line numbers.

It shares nothing with leap_align.py, whose methods are tested against it.  What Algorithm 1 draws, the caller gives,
so that both sides draw the same.  Expectations over prompts and noise are means over the batch.
"""

import torch


def one_step_leap_pred(x_t, v_t, t, s):
    return x_t - (t - s) * v_t


def step(x_t, v_t, t, times):
    return x_t + (times[t - 1] - times[t]) * v_t


def diff(x, y):
    """The mean absolute difference of each sample."""
    return torch.stack([(a - b).abs().mean() for a, b in zip(x, y)])


def stop_grad(x):
    return x.detach()


def grad_of_mean(r, parameters):
    return torch.autograd.grad(r.mean(), parameters)


def algorithm1(
    method, velocity, parameters, r, x_T, times, t_min=None, s=None, K=None, t_k=None, t_j=None, alpha=None, epsilons=()
):
    """The gradient g, a tensor a parameter, of one training step: lines 2-47."""
    T = len(times) - 1

    if method == "leap_align" or method == "draft_lv":  # 2; for the others the caller has drawn t_min
        t_min = 1
    if method == "drtune":  # 3
        # 4: the caller has drawn s
        t_train = {s + i * (T // K) for i in range(K)}  # 5
    # 6, 7: the caller has drawn t_k and t_j for LeapAlign
    x_t = x_T  # 8
    x_hat_jk = None  # line 29 sets it before line 20 reads it, for t_k > t_j

    for t in range(T, 0, -1):  # 9
        if method == "refl" or method == "draft_lv":  # 10
            grad_on = t == t_min
        elif method == "leap_align":
            grad_on = t == t_k or t == t_j
        elif method == "drtune":
            grad_on = True
        else:
            grad_on = False
        if grad_on:  # 11
            torch.set_grad_enabled(True)  # 12
        else:  # 13
            torch.set_grad_enabled(False)  # 14
        if method == "drtune":  # 15
            v_t = velocity(stop_grad(x_t), times[t])  # 16
            if t not in t_train:  # 17
                v_t = stop_grad(v_t)  # 18
        elif method == "leap_align" and t == t_j:  # 19
            x_t = x_hat_jk + stop_grad(x_t - x_hat_jk)  # 20
            v_t = velocity(alpha * x_t + (1 - alpha) * stop_grad(x_t), times[t])  # 21
        else:  # 22
            v_t = velocity(x_t, times[t])  # 23
        if (method == "refl" or method == "drtune") and t == t_min:  # 24
            x_0 = one_step_leap_pred(x_t, v_t, times[t], 0)  # 25
            break  # 26
        if method == "leap_align":  # 27
            if t == t_k:  # 28
                x_hat_jk = one_step_leap_pred(x_t, v_t, times[t_k], times[t_j])  # 29
            elif t == t_j:  # 30
                x_j = x_t  # named for line 37
                x_hat_0j = one_step_leap_pred(x_t, v_t, times[t_j], 0)  # 31
            v_t = stop_grad(v_t)  # 32
            x_t = stop_grad(x_t)  # 33
        x_t = step(x_t, v_t, t, times)  # 34
        x_0 = x_t  # the x_0 of the lines below is the last x_{t-1}

    torch.set_grad_enabled(True)  # 35
    if method == "leap_align":  # 36
        w = stop_grad(1 / (diff(x_j, x_hat_jk) + diff(x_0, x_hat_0j)))  # 37
        x_0 = x_hat_0j + stop_grad(x_0 - x_hat_0j)  # 38
    else:  # 39
        w = 1  # 40
    g = [-d for d in grad_of_mean(w * r(x_0), parameters)]  # 41
    if method == "draft_lv":  # 42
        for epsilon in epsilons:  # 43, 44
            x_1i = (1 - times[1]) * stop_grad(x_0) + times[1] * epsilon  # 45
            x_0i = step(x_1i, velocity(x_1i, times[1]), 1, times)  # 46
            g = [a - d for a, d in zip(g, grad_of_mean(r(x_0i), parameters))]  # 47
    return g
