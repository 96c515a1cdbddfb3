"""The appearance of the app: a Gradio theme, and style.css for the rest. Nothing is fetched; fonts are local."""

from pathlib import Path

import gradio as gr

STYLE_SHEET = Path(__file__).with_name("style.css")

# One accent on warm greys; the accent's 600 on white and 400 on the dark ground both pass WCAG AA for text.
_ACCENT = gr.themes.Color(
    c50="#effaf7", c100="#d6f1ea", c200="#afe3d6", c300="#7fcebd", c400="#4db3a0", c500="#2f9785",
    c600="#1f7a6c", c700="#1b6258", c800="#194e47", c900="#17413c", c950="#0a2724", name="teal-calm",
)  # fmt: skip
_NEUTRAL = gr.themes.Color(
    c50="#fafaf9", c100="#f4f4f2", c200="#e6e6e3", c300="#d3d3cf", c400="#a1a19b", c500="#73736d",
    c600="#565651", c700="#40403c", c800="#272724", c900="#1b1b19", c950="#121211", name="stone-calm",
)  # fmt: skip


def build_theme() -> gr.themes.Base:
    """The app's theme, for light and dark."""
    return gr.themes.Base(
        primary_hue=_ACCENT,
        secondary_hue=_ACCENT,
        neutral_hue=_NEUTRAL,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_800",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_text_weight="500",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )
