//! Images, copy-on-write overlays and the micro template.
