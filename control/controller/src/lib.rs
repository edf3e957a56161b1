//! The loop: event, engine, store, dispatch.
