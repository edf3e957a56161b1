//! Godwit: provisions virtual machines and moves them while they run.

fn main() {}
