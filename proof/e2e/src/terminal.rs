//! A person at a terminal: a pseudo-terminal on which a command runs, what it shows, and what is typed.

use anyhow::{Context, Result, bail};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Pieces of output that wait to be looked at.
const PIECES_KEPT: usize = 1024;

/// A command on a terminal, or between two pipes. Dropping it kills the command.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    shown: String,
}

impl Terminal {
    /// Starts a command on a terminal of its own.
    ///
    /// # Errors
    /// When there is no pseudo-terminal to be had, or the command does not start.
    pub fn start(command: &mut Command) -> Result<Terminal> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("cannot open a pseudo-terminal")?;
        grantpt(&ours)
            .and_then(|()| unlockpt(&ours))
            .context("cannot unlock a pseudo-terminal")?;
        let name = ptsname(&ours, Vec::new()).context("a pseudo-terminal has no name")?;
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let theirs = File::options()
            .read(true)
            .write(true)
            .open(path)
            .context("cannot open a pseudo-terminal")?;
        let copy = || theirs.try_clone().context("cannot duplicate a terminal");
        command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
        let child = command.spawn().context("cannot start a command on a terminal")?;
        let keyboard = File::from(ours);
        let screen = keyboard.try_clone().context("cannot duplicate a terminal")?;
        Ok(Terminal::over(child, keyboard, screen))
    }

    /// Starts a command between two pipes, as a script would.
    ///
    /// # Errors
    /// When the command does not start.
    pub fn piped(command: &mut Command) -> Result<Terminal> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a command")?;
        let keyboard = OwnedFd::from(child.stdin.take().context("a piped standard input")?);
        let screen = OwnedFd::from(child.stdout.take().context("a piped standard output")?);
        Ok(Terminal::over(child, keyboard.into(), screen.into()))
    }

    fn over(child: Child, keyboard: File, mut screen: File) -> Terminal {
        let (sender, shown) = sync_channel(PIECES_KEPT);
        thread::spawn(move || {
            let mut piece = [0; 4096];
            loop {
                match screen.read(&mut piece) {
                    Ok(0) => return,
                    Ok(count) if sender.send(piece[..count].to_vec()).is_err() => return,
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // A terminal whose other end is closed says EIO.
                    Err(_) => return,
                }
            }
        });
        Terminal {
            child,
            keyboard,
            screen: shown,
            shown: String::new(),
        }
    }

    /// Types.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        self.keyboard.write_all(text.as_bytes()).context("cannot type")
    }

    /// Gives the terminal a size; whoever draws on it sees that when it draws next.
    ///
    /// # Errors
    /// When it is no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.keyboard, size).context("cannot give a terminal a size")
    }

    /// Waits until a text is shown, and forgets what was shown up to its end; returns what stood before it.
    ///
    /// # Errors
    /// When it is not shown within `limit`; has what was.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.shown.find(text) {
                let rest = self.shown.split_off(at + text.len());
                let mut before = std::mem::replace(&mut self.shown, rest);
                before.truncate(at);
                return Ok(before);
            }
            match self.screen.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(piece) => self.shown.push_str(&String::from_utf8_lossy(&piece)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "`{text}` is not shown within {} s, but {:?}",
                        limit.as_secs(),
                        self.shown
                    )
                }
                Err(RecvTimeoutError::Disconnected) => bail!("it ended without showing `{text}`, but {:?}", self.shown),
            }
        }
    }

    /// The command's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the command's end.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for a command")? {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!(
                    "the command goes on after {} s, and shows {:?}",
                    limit.as_secs(),
                    self.shown
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_on_a_terminal_reaches_the_command_and_its_words_come_back() {
        let mut terminal = Terminal::start(&mut Command::new("cat")).unwrap();
        terminal.type_in("hello\n").unwrap();
        // Once by the terminal's echo, once by the command.
        terminal.wait_for("hello", Duration::from_secs(5)).unwrap();
        terminal.wait_for("hello", Duration::from_secs(5)).unwrap();
        terminal.type_in("\u{4}").unwrap();
        assert!(terminal.wait_end(Duration::from_secs(5)).unwrap().success());
        assert!(terminal.wait_for("more", Duration::from_secs(5)).is_err());
    }

    #[test]
    fn a_command_between_pipes_is_killed_when_nobody_looks_any_more() {
        let mut piped = Terminal::piped(&mut Command::new("cat")).unwrap();
        piped.type_in("a\nb\n").unwrap();
        assert_eq!(piped.wait_for("b\n", Duration::from_secs(5)).unwrap(), "a\n");
        let stat = format!("/proc/{}", piped.id());
        drop(piped);
        assert!(!std::path::Path::new(&stat).exists());
    }
}
