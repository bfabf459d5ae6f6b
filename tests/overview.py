"""One picture of what all scripts measured: method and baselines, means over the seeds.

`python -m tests.reproduce` draws it into data/results/overview.png from the stored numbers.
"""

import json

import matplotlib
from matplotlib.figure import Figure

METHOD, BASE, OTHER, LINE = "#0072b2", "#000000", "#e69f00", "#d55e00"

# script: title, what is measured, {label: (arm, metric)} with the method last, (line, its meaning)
PANELS = {
    "mod": ("mod: beats dense, not shallow", "loss (nats), equal training FLOPs",
            {"dense": ("dense", "loss"), "random": ("random", "loss"),
             "shallow": ("shallow", "loss"), "mod": ("mod", "loss")}, None),
    "mor": ("mor: three passes at the price of two", "right after five operands",
            {"two passes": ("uniform", "k5"), "random": ("random", "k5"),
             "three passes": ("recursive", "k5"), "mor": ("mor", "k5")}, (1 / 6, "a guess")),
    "tah": ("tah: a second pass for few", "right answers to hard questions (%)",
            {"one pass": ("standard", "hard"), "all twice": ("always", "hard"),
             "all twice,\nduo": ("always_duo", "hard"), "tah": ("tah", "hard")}, (100 / 7, "a guess")),
    "adainfer": ("adainfer: a smaller model saves as much", "time of a batch of prompts (ms)",
                 {"all layers": ("adainfer", "ms_dense"), "smaller model": ("smaller", "ms_dense"),
                  "stopping": ("adainfer", "ms_stop")}, None),
    "looped": ("looped: depth without parameters", "right after 4 hops and more",
               {"1 layer": ("shallow", "chain"), "6 layers": ("deep", "chain"),
                "1 layer, 6 times": ("looped", "chain")}, (0.25, "a guess")),
    "recurrent_depth": ("recurrent depth: thinks 8 times longer", "right at length 48",
                        {"1 iteration": ("twin", "longest_r64"), "20 layers": ("untied", "longest_r64"),
                         "iterated": ("recurrent", "longest_r64")}, (0.5, "a guess")),
    "coconut": ("coconut: two paths at once", "right answers, t against t'",
                {"no CoT": ("no_cot", "two_way"), "pauses": ("pause", "two_way"),
                 "CoT": ("cot", "two_way"), "coconut": ("coconut", "two_way")}, (0.75, "a branch is guessed")),
    "hrpo": ("hrpo: mixtures carry what words lose", "right answers, greedy",
             {"supervised": ("sft", "greedy"), "grpo": ("grpo", "greedy"),
              "own word": ("selftok", "greedy"), "hrpo": ("hrpo", "greedy")}, None),
    "llada": ("llada: facts asked in reverse", "right answers",
              {"left to right": ("ar facts", "reverse"), "llada": ("llada facts", "reverse")}, None),
    "remdm": ("remdm: remasking repairs", "jumps per sequence, 512 steps",
              {"mdlm": ("mdlm", "network mdlm 512"), "fb": ("mdlm", "network fb 512"),
               "loop": ("mdlm", "network loop 512"), "cap": ("mdlm", "network cap 512")}, (5.775, "truth")),
    "softmask": ("softmask: beliefs cross steps", "loss (nats), equal training FLOPs",
                 {"mdlm": ("mdlm", "loss"), "looped": ("looped", "loss"),
                  "softmask": ("softmask", "loss")}, (0.802, "floor of one pass")),
}


@matplotlib.rc_context({"font.size": 13, "figure.constrained_layout.use": True})
def draw(folder, order):
    """Writes overview.png into a folder of stored results, scripts in this order."""
    stored = {name: json.loads((folder / f"{name}.json").read_text()) for name in order
              if (folder / f"{name}.json").exists()}
    names = [name for name in stored if name in PANELS]
    rows = -(-(len(names) + 1) // 4)
    figure = Figure(figsize=(22, 4.4 * rows))
    panels = figure.subplots(rows, 4, squeeze=False).flatten()
    for panel, name in zip(panels, names):
        title, label, bars, line = PANELS[name]
        found = [stored[name]["arms"][arm][metric] for arm, metric in bars.values()]
        means, spread = ([value[key] for value in found] for key in ("mean", "sd"))
        colors = [BASE] + [OTHER] * (len(bars) - 2) + [METHOD]
        drawn = panel.bar(list(bars), means, yerr=spread, capsize=6, color=colors, ecolor="#999999")
        for bar, hatch in zip(drawn, ["", *["//"] * (len(bars) - 2), ""]):
            bar.set_hatch(hatch)
        panel.bar_label(drawn, fmt="%.2f", padding=3)
        if line:
            panel.axhline(line[0], color=LINE, linestyle="--", label=line[1])
            panel.legend(loc="upper left")
        panel.set(title=title, ylabel=label, ylim=(0, 1.25 * max(means + [line[0] if line else 0])))
    tally, seeds = panels[len(names)], [[], [], []]
    for name, result in stored.items():
        holds = [claim["verdicts"].count("holds") for claim in result["claims"]]
        for part, low, high in zip(seeds, (3, 1, 0), (3, 2, 0)):
            part.append(sum(low <= n <= high for n in holds))
    left, kinds = [0] * len(stored), ("all seeds", "some seeds", "no seed")
    for part, kind, color, hatch in zip(seeds, kinds, (METHOD, OTHER, LINE), ("", "//", "xx")):
        tally.barh(list(stored), part, left=left, color=color, hatch=hatch, label=f"hold on {kind}")
        left = [a + b for a, b in zip(left, part)]
    tally.invert_yaxis()
    tally.set(title=f"{sum(seeds[0])} of {sum(left)} claims hold on all seeds", xlabel="claims",
              xlim=(0, 2.4 * max(left)))
    tally.legend(loc="upper right")
    for panel in panels[len(names) + 1 :]:
        panel.remove()
    figure.savefig(folder / "overview.png", dpi=70)
