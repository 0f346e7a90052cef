"""The colours of all pictures, told apart by the colour-blind."""

# Okabe and Ito's, without the yellow that white paper swallows.
OF_RUNS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#000000',
)
# Tol's "muted" with black: ten classes.
OF_CLASSES = (
  '#332288',
  '#88CCEE',
  '#44AA99',
  '#117733',
  '#999933',
  '#DDCC77',
  '#CC6677',
  '#882255',
  '#AA4499',
  '#000000',
)
