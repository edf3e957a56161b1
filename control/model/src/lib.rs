//! The nouns of Godwit: ids, specs, statuses, commands, events, effects.
