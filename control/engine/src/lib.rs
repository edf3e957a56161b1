//! Pure decisions: what the cell does next, given the world and an event.
