//! Following an operation to its end: a live line where somebody watches, then what it came to.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use clap::Args;
use model::{
    OperationId,
    operation::{OperationState, Progress},
    query::OperationView,
};
use serde::Deserialize;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    client::Client,
    exit::{Exit, Failure},
    out::{self, Format, live::Live},
};

/// How long a server that went away is waited for: it may be restarting.
pub(crate) const AWAY_MAX: Duration = Duration::from_secs(60);

/// Pause between tries to reach it again.
pub(crate) const AWAY_PAUSE: Duration = Duration::from_millis(500);

/// Seconds that one request waits at the server.
const WAIT_S: u64 = 30;

/// Whether a command waits for the end of what it began.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Wait {
    /// Wait until it is done (the default on a terminal)
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Return as soon as it is accepted (the default elsewhere)
    #[arg(long)]
    no_wait: bool,
    /// Wait at most this long, then end with exit code 6; the operation goes on
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

impl Wait {
    /// Always, for as long as it takes.
    pub(crate) const ALWAYS: Self = Self {
        wait: true,
        no_wait: false,
        timeout: None,
    };

    /// Waiting for at most so many seconds.
    pub(crate) const fn at_most(timeout: Option<u64>) -> Self {
        Self {
            timeout,
            ..Self::ALWAYS
        }
    }

    /// Unless told otherwise, where a person looks at the output.
    fn waits(self) -> bool {
        self.wait || self.timeout.is_some() || (!self.no_wait && std::io::stdout().is_terminal())
    }

    /// The same for commands that wait wherever they run, unless told otherwise.
    pub(crate) fn unless_told(self) -> Self {
        Self {
            wait: !self.no_wait,
            ..self
        }
    }
}

/// What a server answers about progress, as an event.
#[derive(Deserialize)]
struct ProgressEvent {
    operation: OperationId,
    progress: Progress,
}

/// Where an operation stands when a command is through with it.
pub(crate) struct Followed {
    /// As the server tells it.
    pub(crate) value: Value,
    /// As it is understood.
    pub(crate) view: OperationView,
}

impl Followed {
    /// Whether it was done.
    pub(crate) fn is_done(&self) -> bool {
        self.view.operation.state == OperationState::Succeeded
    }
}

/// Follows the operation that a request was answered with, as far as `wait` says. For programs its last state is printed
/// whatever it came to.
///
/// # Errors
/// When it failed or was cancelled, time is out, or somebody pressed Ctrl-C: it then goes on.
pub(crate) async fn follow(client: &Client, format: Format, answer: Value, wait: Wait) -> Result<Followed, Failure> {
    follow_saying(client, format, answer, wait, "").await
}

/// The same, and says what is waited for until there is progress to tell.
pub(crate) async fn follow_saying(
    client: &Client,
    format: Format,
    answer: Value,
    wait: Wait,
    waiting_for: &str,
) -> Result<Followed, Failure> {
    let mut followed = understood(answer)?;
    if wait.waits() && !followed.view.operation.state.is_over() {
        let timeout = wait.timeout.map(Duration::from_secs);
        followed = until_over(client, &followed.view, timeout, waiting_for).await?;
    }
    if format.is_data() {
        out::data(format, &followed.value)?;
    }
    let operation = &followed.view.operation;
    let about = format!("{} {}", operation.kind.name(), operation.target.name);
    match &operation.state {
        OperationState::Running if !format.is_data() => {
            out::line(&format!("{about}: accepted as operation {}", operation.id))?;
            out::note(&format!("  to follow it: godwit op wait {}", operation.id));
            Ok(followed)
        }
        OperationState::Running | OperationState::Succeeded => Ok(followed),
        OperationState::Failed { reason } => {
            let mut reason = reason.clone();
            reason.message = format!("{about} failed: {}", reason.message);
            Err(Failure::from(reason).about(operation.id))
        }
        OperationState::Cancelled => {
            Err(Failure::new(Exit::Failed, format!("{about} was cancelled")).about(operation.id))
        }
    }
}

fn understood(value: Value) -> Result<Followed, Failure> {
    let view = out::read(&value)?;
    Ok(Followed { value, view })
}

async fn until_over(
    client: &Client,
    begun: &OperationView,
    timeout: Option<Duration>,
    waiting_for: &str,
) -> Result<Followed, Failure> {
    let operation = &begun.operation;
    let (id, about) = (
        operation.id,
        format!("{} {}", operation.kind.name(), operation.target.name),
    );
    // Before the line is there: who sees it may press Ctrl-C at once.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| Failure::of(Exit::Failed, &error).about(id))?;
    let live = Live::new(&about);
    live.say(waiting_for);
    let over = poll(client, id);
    let shown = show(client, id, &live);
    let late = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        over = over => over,
        never = shown => match never {},
        () = late => {
            let message = format!("{about} is not done after {} s; it goes on", timeout.unwrap_or_default().as_secs());
            Err(interrupted(Exit::TimedOut, message, id))
        }
        _ = interrupt.recv() => {
            drop(live);
            Err(interrupted(Exit::Interrupted, format!("no longer waiting for {about}; it goes on"), id))
        }
    }
}

fn interrupted(exit: Exit, message: String, id: OperationId) -> Failure {
    let hint = format!("follow it with `godwit op wait {id}`, give it up with `godwit op cancel {id}`");
    Failure::new(exit, message).hint(hint).about(id)
}

/// Asks until the operation is over. A server that restarts meanwhile is waited for.
async fn poll(client: &Client, id: OperationId) -> Result<Followed, Failure> {
    let mut away: Option<Instant> = None;
    loop {
        match client
            .get(&format!("/v1/operations/{id}/wait?timeout_s={WAIT_S}"))
            .await
        {
            Ok(value) => {
                away = None;
                let followed = understood(value)?;
                if followed.view.operation.state.is_over() {
                    return Ok(followed);
                }
            }
            Err(failure) if failure.may_pass() => {
                if away.get_or_insert_with(Instant::now).elapsed() > AWAY_MAX {
                    return Err(failure.about(id));
                }
                // A server that is not there has no event to wait for.
                tokio::time::sleep(AWAY_PAUSE).await;
            }
            Err(failure) => return Err(failure.about(id)),
        }
    }
}

/// Keeps the live line up to date; without anybody to see it there is nothing to ask for. It ends by being dropped.
async fn show(client: &Client, id: OperationId, live: &Live) -> std::convert::Infallible {
    while live.is_seen() {
        let Ok(mut events) = client.events(None, true).await else {
            break;
        };
        while let Ok(Some(event)) = events.next().await {
            let progress = serde_json::from_str::<ProgressEvent>(&event.data).ok();
            if let Some(ProgressEvent { progress, .. }) = progress.filter(|event| event.operation == id) {
                live.tell(&progress);
            }
        }
        tokio::time::sleep(AWAY_PAUSE).await;
    }
    std::future::pending().await
}
