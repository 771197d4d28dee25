"""The experiments of the papers, with their set-ups: `fastvae reproduce fig2|fig3|fig4|fig5|table1`.

Each is the trainer's own runs, one directory per curve, and writes into its folder

    runs/CURVE/...       run directories, from which an interrupted experiment goes on
    curves/CURVE.json    a curve that is whole; it is not run again
    NAME.json            everything measured, beside what was published
    NAME.png, NAME.md    the figure, the table

Processes that run different curves (`--only`) may share a folder.
"""
