//! `godwit vm console`: this terminal as the VM's serial console.

use std::io::{self, IsTerminal as _, Write as _};

use model::name::Reference;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    commands::Session,
    exit::{Exit, Failure},
    out,
};

/// Ctrl-], as telnet has it: leaves the console.
const LEAVE: u8 = 0x1d;

const PIECE_BYTES: usize = 16 << 10;

/// Joins standard input and output with the guest's serial port until either side leaves. Without a terminal the end of the
/// input is not the end: what the guest prints goes on.
pub(super) async fn run(session: &Session, vm: &Reference) -> Result<(), Failure> {
    let stream = session.client.console(&vm.to_string()).await?;
    let (mut guest_prints, mut guest_reads) = tokio::io::split(stream);
    let raw = Raw::begin().map_err(|error| Failure::of(Exit::Failed, &error))?;
    if raw.is_some() {
        out::note("connected; Ctrl-] leaves the console\r");
    }
    let printed = async {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = guest_prints.read(&mut piece).await.map_err(|error| gone(&error))?;
            if count == 0 {
                return Ok(());
            }
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
            let leave = raw.as_ref().and_then(|_| bytes.iter().position(|byte| *byte == LEAVE));
            let bytes = &bytes[..leave.unwrap_or(count)];
            guest_reads.write_all(bytes).await.map_err(|error| gone(&error))?;
            guest_reads.flush().await.map_err(|error| gone(&error))?;
            match (leave, count) {
                (Some(_), _) => return Ok(()),
                (None, 0) => return std::future::pending().await,
                _ => {}
            }
        }
    };
    tokio::select! {
        ended = printed => ended,
        ended = typed => ended,
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
