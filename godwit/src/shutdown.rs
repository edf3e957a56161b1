//! The signals that end a server: SIGTERM and SIGINT.

use tokio::signal::unix::{SignalKind, signal};

use crate::exit::{Exit, Failure};

/// Waits for SIGTERM or SIGINT. They are listened for from the call on, not from the first poll.
pub(crate) fn asked_for() -> Result<impl Future<Output = ()>, Failure> {
    let listen = |kind| signal(kind).map_err(|error| Failure::of(Exit::Failed, &error));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
