"""Pictures of what a model sees: arrays in, figure out. `dinov2 visualize` draws them from the command line."""

from dinov2.eval.visualize.attention import AttentionMaps, attention_maps, plot_attention_heads, plot_attention_tokens
from dinov2.eval.visualize.command import get_args_parser, main
from dinov2.eval.visualize.figures import MissingExtra, draw_grid, overlay_heat, save
from dinov2.eval.visualize.inputs import choose_cells, model_views, patch_tokens, to_model
from dinov2.eval.visualize.neighbors import (
    LabelIssues,
    find_label_issues,
    find_neighbours,
    label_issues_of,
    plot_label_issues,
    plot_neighbours,
    plot_typical,
    typicality,
)
from dinov2.eval.visualize.pca_rgb import PatchColours, PatchPCA, fit_patch_pca, plot_pca
from dinov2.eval.visualize.umap import plot_embedding, reduce_to_2d

__all__ = [
    "AttentionMaps",
    "LabelIssues",
    "MissingExtra",
    "PatchColours",
    "PatchPCA",
    "attention_maps",
    "choose_cells",
    "draw_grid",
    "find_label_issues",
    "find_neighbours",
    "fit_patch_pca",
    "get_args_parser",
    "label_issues_of",
    "main",
    "model_views",
    "overlay_heat",
    "patch_tokens",
    "plot_attention_heads",
    "plot_attention_tokens",
    "plot_embedding",
    "plot_label_issues",
    "plot_neighbours",
    "plot_pca",
    "plot_typical",
    "reduce_to_2d",
    "save",
    "to_model",
    "typicality",
]
