//! `godwit vm console`: this terminal as the VM's serial console.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use model::{VmState, name::Reference, query::VmView};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    commands::Session,
    exit::{Exit, Failure},
    out,
};

/// Ctrl-], as telnet has it: leaves the console.
const LEAVE: u8 = 0x1d;

const PIECE_BYTES: usize = 16 << 10;

/// A guest that prints nothing for so long has answered an input that is over.
const QUIET: Duration = Duration::from_secs(1);

/// Longest wait for a guest to fall quiet after the end of the input.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// How the joining of terminal and guest came to its end.
enum End {
    /// The person left, or the input is over and answered.
    Left,
    /// From the other side.
    Closed,
}

/// Joins standard input and output with the guest's serial port until either side leaves. Input that is no terminal ends it too,
/// when the guest has printed its answer.
pub(super) async fn run(session: &Session, vm: &Reference) -> Result<(), Failure> {
    let before = view(session, vm).await?;
    let stream = session.client.console(&vm.to_string()).await?;
    let raw = Raw::begin().map_err(|error| Failure::of(Exit::Failed, &error))?;
    if raw.is_some() {
        out::note("connected; press Enter for a prompt, Ctrl-] to leave\r");
    }
    let end = join(stream, raw.is_some()).await?;
    // The terminal as it was, before anything is said.
    drop(raw);
    match end {
        End::Left => Ok(()),
        End::Closed => Err(why_closed(&before, &view(session, vm).await?)),
    }
}

async fn view(session: &Session, vm: &Reference) -> Result<VmView, Failure> {
    out::read(&session.client.get(&format!("/v1/vms/{vm}")).await?)
}

/// Why the other side ended a console, from how the VM was before and how it is now.
fn why_closed(before: &VmView, now: &VmView) -> Failure {
    let name = &now.name;
    let host = |view: &VmView| view.host.as_ref().map(|host| host.id);
    let again = format!("connect again: godwit vm console {name}");
    let place = now
        .host
        .as_ref()
        .map(|host| format!(" to {}", host.name))
        .unwrap_or_default();
    let (message, hint) = match now.status.state {
        VmState::Migrating => (format!("{name} moves to another host"), again),
        VmState::Active | VmState::Paused if host(before) != host(now) => (format!("{name} moved{place}"), again),
        VmState::Active | VmState::Paused => (
            format!("the console of {name} was closed; the VM is {}", now.status.state),
            again,
        ),
        state => {
            let reason = now
                .status
                .reason
                .as_ref()
                .map(|reason| format!(": {reason}"))
                .unwrap_or_default();
            (
                format!("{name} is {state}{reason}"),
                format!("start it: godwit vm start {name}"),
            )
        }
    };
    Failure::new(Exit::Failed, message).hint(hint)
}

async fn join(stream: impl AsyncRead + AsyncWrite, is_terminal: bool) -> Result<End, Failure> {
    let (mut guest_prints, mut guest_reads) = tokio::io::split(stream);
    let (printed_at, mut quiet_since) = watch::channel(Instant::now());
    let printed = async {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = guest_prints.read(&mut piece).await.map_err(|error| gone(&error))?;
            if count == 0 {
                return Ok(End::Closed);
            }
            printed_at.send_replace(Instant::now());
            let mut stdout = io::stdout().lock();
            let written = stdout.write_all(&piece[..count]).and_then(|()| stdout.flush());
            written.map_err(|error| Failure::output(&error))?;
        }
    };
    let typed = async {
        let (mut stdin, mut piece) = (tokio::io::stdin(), vec![0; PIECE_BYTES]);
        loop {
            let count = stdin
                .read(&mut piece)
                .await
                .map_err(|error| Failure::of(Exit::Failed, &error))?;
            let bytes = &piece[..count];
            let leave = bytes.iter().position(|byte| *byte == LEAVE).filter(|_| is_terminal);
            let bytes = &bytes[..leave.unwrap_or(count)];
            guest_reads.write_all(bytes).await.map_err(|error| gone(&error))?;
            guest_reads.flush().await.map_err(|error| gone(&error))?;
            if leave.is_some() {
                return Ok(End::Left);
            }
            if count == 0 {
                fall_quiet(&mut quiet_since).await;
                return Ok(End::Left);
            }
        }
    };
    tokio::select! {
        ended = printed => ended,
        ended = typed => ended,
    }
}

/// Waits until the guest has printed nothing for [`QUIET`], counted from now; at most [`DRAIN_MAX`].
async fn fall_quiet(printed: &mut watch::Receiver<Instant>) {
    let over = Instant::now() + DRAIN_MAX;
    loop {
        printed.mark_unchanged();
        let quiet = (Instant::now() + QUIET).min(over);
        match timeout_at(quiet, printed.changed()).await {
            Ok(Ok(())) if Instant::now() < over => {}
            Ok(Err(_)) => return sleep_until(quiet).await,
            _ => return,
        }
    }
}

fn gone(error: &io::Error) -> Failure {
    Failure::new(Exit::Failed, format!("the console broke off: {error}")).hint("the VM goes on; connect again")
}

/// The terminal in raw mode, as it was when dropped.
struct Raw(Termios);

impl Raw {
    /// `None` where input or output is no terminal.
    fn begin() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_input_waits_for_the_guests_last_words() {
        let (printed, mut heard) = watch::channel(Instant::now());
        let began = Instant::now();
        let (late, ()) = tokio::join!(
            async {
                fall_quiet(&mut heard).await;
                began.elapsed()
            },
            async {
                // tidy: sleep because the clock is the test's own and stands.
                tokio::time::sleep(QUIET / 2).await;
                printed.send_replace(Instant::now());
            }
        );
        assert!(late >= QUIET + QUIET / 2 && late < DRAIN_MAX, "{late:?}");
    }
}
