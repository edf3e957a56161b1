//! `godwit login`, `logout`, `whoami`: sessions, and passwords as people type them.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
};

use clap::Args;
use controller::ClientFile;
use identity::{ApiToken, secret_file};
use model::{
    Name, ProjectId, Role, Timestamp,
    query::{Named, TokenView},
};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde::Deserialize;
use serde_json::json;

use super::{Session, host::said};
use crate::{
    cli::Common,
    client::{
        Client,
        locate::{locate_to_log_in, login_files},
    },
    exit::{Exit, Failure, chain},
    out::{self, table, units},
};

/// Longest line that is read for a password or a name, bytes.
const LINE_MAX: u64 = 1024;

/// Begin a session. What follows asks with its token, unless told otherwise.
#[derive(Args, Debug)]
pub(crate) struct Login {
    /// The user; asked for on the terminal when it is left out
    user: Option<Name>,
    /// File whose first line is the password; `-` is standard input. Without it, it is asked for on the terminal
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Begun {
    token: String,
    expires_at: Timestamp,
}

#[derive(Deserialize)]
struct WhoAmI {
    subject: String,
    project: Named<ProjectId>,
    role: Role,
    token: TokenView,
}

impl Login {
    pub(crate) async fn run(self, common: &Common) -> Result<(), Failure> {
        let env = |name: &str| std::env::var_os(name);
        let server = locate_to_log_in(&common.flags(), env)?;
        let unknown = || {
            Failure::new(
                Exit::Usage,
                "there is no place for the session: neither XDG_CONFIG_HOME nor HOME is set",
            )
            .hint("set one of them")
        };
        let (directory, file, token_file) = login_files(env).ok_or_else(unknown)?;
        let user = match self.user {
            Some(user) => user,
            None => asked_name()?,
        };
        let password = password(self.password_file.as_deref(), &format!("password of {user}"))?;
        let address = server.address.clone();
        let ca = server.authority.to_pem();
        let client = Client::new(server);
        let answer = client
            .post("/v1/login", &json!({ "user": user, "password": password }))
            .await?;
        let begun: Begun = out::read(&answer)?;
        let token: ApiToken = begun
            .token
            .parse()
            .map_err(|error| Failure::of(Exit::Unreachable, &error))?;
        let ca_file = directory.join("login-ca.pem");
        let client_file = ClientFile {
            server: format!("https://{address}"),
            ca: ca_file.clone(),
            token_file: token_file.clone(),
        };
        let text = serde_json::to_string_pretty(&client_file).map_err(|error| Failure::of(Exit::Failed, &error))?;
        let kept = secret_file::private_directory(&directory)
            .and_then(|()| secret_file::replace(&ca_file, ca.as_bytes()))
            .and_then(|()| secret_file::replace(&token_file, format!("{}\n", token.reveal()).as_bytes()))
            .and_then(|()| secret_file::replace(&file, format!("{text}\n").as_bytes()));
        kept.map_err(|error| Failure::of(Exit::Failed, &error).hint("the session was begun, and nobody can use it"))?;
        if common.output.is_data() {
            return out::data(common.output, &json!({ "user": user, "expires_at": begun.expires_at }));
        }
        let until = units::show_time(begun.expires_at);
        out::line(&format!("logged in as {user}, until {until}"))
    }
}

/// Ends the token that is used, and forgets it if a login left it.
pub(crate) async fn logout(session: &Session) -> Result<(), Failure> {
    let ended = session.client.post("/v1/logout", &json!({})).await;
    let files = login_files(|name| std::env::var_os(name));
    let ours = files.filter(|(_, _, token)| token.display().to_string() == session.client.server().token_from);
    // What the server does not know any more is to be forgotten all the same.
    let over = ended.is_ok() || ended.as_ref().is_err_and(|failure| failure.is_unauthenticated());
    if let Some((_, file, token)) = ours.filter(|_| over) {
        for path in [file, token] {
            std::fs::remove_file(&path)
                .or_else(|error| {
                    if error.kind() == io::ErrorKind::NotFound {
                        Ok(())
                    } else {
                        Err(error)
                    }
                })
                .map_err(|error| Failure::new(Exit::Failed, format!("cannot remove {}: {error}", path.display())))?;
        }
    }
    ended?;
    said(session, true, "logged out")
}

/// Who asks, and with what right.
pub(crate) async fn whoami(session: &Session) -> Result<(), Failure> {
    let from = session.client.server().token_from.clone();
    session
        .show("/v1/whoami", |who: WhoAmI| {
            let mut facts = vec![
                ("subject", who.subject),
                ("project", who.project.name.to_string()),
                ("role", who.role.to_string()),
                ("token", format!("{} {}", who.token.kind.name(), who.token.id)),
                ("token from", from.clone()),
            ];
            if let Some(end) = who.token.expires_at {
                facts.push(("valid until", units::show_time(end)));
            }
            table::facts(&facts)
        })
        .await
}

/// A password: the first line of a file or of standard input, or what is typed, unseen.
pub(crate) fn password(file: Option<&Path>, what: &str) -> Result<String, Failure> {
    let unreadable =
        |error: io::Error| Failure::new(Exit::Failed, format!("the {what} cannot be read: {}", chain(&error)));
    let line = match file {
        Some(path) if path == Path::new("-") => first_line(io::stdin().lock()),
        Some(path) => File::open(path).and_then(first_line),
        None => return typed(what),
    };
    line.map_err(unreadable)
}

/// A new password: typed twice where it is typed.
pub(crate) fn new_password(file: Option<&Path>, what: &str) -> Result<String, Failure> {
    let one = password(file, what)?;
    if file.is_none() && one != typed(&format!("{what}, once more"))? {
        return Err(Failure::new(Exit::Usage, "the two are not the same").hint("try again"));
    }
    Ok(one)
}

fn first_line(from: impl io::Read) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(from.take(LINE_MAX)).read_line(&mut line)?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

fn terminal() -> Result<File, Failure> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/tty");
    let terminal = opened.ok().filter(|terminal| terminal.is_terminal());
    terminal.ok_or_else(|| {
        Failure::new(Exit::Usage, "there is no terminal to ask on")
            .hint("give --password-file FILE, or - for standard input")
    })
}

fn asked_name() -> Result<Name, Failure> {
    let mut terminal = terminal()?;
    let asked = write!(terminal, "user: ").and_then(|()| first_line(&terminal));
    let line = asked.map_err(|error| Failure::of(Exit::Failed, &error))?;
    line.trim().parse().map_err(|error| Failure::of(Exit::Usage, &error))
}

/// Brings a terminal's modes back, however the reading ends.
struct Unseen<'t>(&'t File, Termios);

impl Drop for Unseen<'_> {
    fn drop(&mut self) {
        // A terminal that is gone shows nothing any more.
        let _ = tcsetattr(self.0, OptionalActions::Flush, &self.1);
    }
}

fn typed(what: &str) -> Result<String, Failure> {
    let terminal = terminal()?;
    let failed = |error: io::Error| Failure::of(Exit::Failed, &error);
    let before = tcgetattr(&terminal).map_err(|error| failed(error.into()))?;
    let mut unseen = before.clone();
    unseen.local_modes.remove(LocalModes::ECHO);
    unseen.local_modes.insert(LocalModes::ECHONL);
    let guard = Unseen(&terminal, before);
    tcsetattr(&terminal, OptionalActions::Flush, &unseen).map_err(|error| failed(error.into()))?;
    write!(&terminal, "{what}: ").map_err(failed)?;
    let line = first_line(&terminal).map_err(failed)?;
    drop(guard);
    Ok(line)
}
