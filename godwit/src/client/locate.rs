//! Where the server is, which authority it must be of, and with which token it is asked.
//!
//! In this order, each part by itself: `--server`, `--ca`, `--token-file`; the client file of `--state DIR`; `GODWIT_SERVER`, `GODWIT_CA`,
//! `GODWIT_TOKEN_FILE`; what `godwit login` left in `~/.config/godwit`, the client files there and in `/var/lib/godwit`.
//!
//! What is named, by an option or a variable, is binding: where it is of no use the command fails, and asks nobody else.

use std::{
    ffi::OsString,
    io::Read as _,
    path::{Path, PathBuf},
};

use controller::ClientFile;
use hyper::header::HeaderValue;
use identity::{Address, ApiToken, CaCertificate};
use model::name::Reference;

use crate::exit::{Exit, Failure, chain};

/// Longest client file or certificate, bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The interface's port where an address names none.
const PORT: u16 = 7443;

/// A server and how it is asked. Nothing here is shown by `Debug`.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) address: Address,
    pub(crate) address_from: String,
    pub(crate) authority: CaCertificate,
    pub(crate) authority_from: String,
    /// `None` only to log in.
    token: Option<ApiToken>,
    pub(crate) token_from: String,
    /// The project that requests are about, where one was chosen.
    pub(crate) project: Option<Reference>,
}

impl Server {
    /// The value of the `Authorization` header.
    pub(super) fn bearer(&self) -> Option<HeaderValue> {
        let value = HeaderValue::try_from(format!("Bearer {}", self.token.as_ref()?.reveal()));
        let mut value = value.expect("a token is letters and digits");
        value.set_sensitive(true);
        Some(value)
    }
}

/// What the command line says of the server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flags {
    pub(crate) state: Option<PathBuf>,
    pub(crate) server: Option<String>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) project: Option<Reference>,
}

/// One part of the answer, and where it is from.
type Found<T> = Option<(T, String)>;

#[derive(Default)]
struct Parts {
    server: Found<String>,
    ca: Found<PathBuf>,
    token_file: Found<PathBuf>,
    looked: Vec<String>,
    /// No token is needed.
    logs_in: bool,
}

impl Parts {
    fn is_whole(&self) -> bool {
        self.server.is_some() && self.ca.is_some() && self.token_file.is_some()
    }

    fn add(&mut self, server: Found<String>, ca: Found<PathBuf>, token_file: Found<PathBuf>) {
        self.server = self.server.take().or(server);
        self.ca = self.ca.take().or(ca);
        self.token_file = self.token_file.take().or(token_file);
    }

    /// Adds what a client file has; one that is not there, or that this user may not read, has nothing.
    fn add_file(&mut self, path: &Path) -> Result<bool, Failure> {
        self.looked.push(path.display().to_string());
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                self.looked.push("  (which this user may not read)".to_owned());
                return Ok(false);
            }
            Err(error) if is_absent(&error) => return Ok(false),
            Err(error) => return Err(unusable(path, &chain(&error))),
        };
        let mut text = Vec::new();
        file.take(FILE_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(|error| unusable(path, &chain(&error)))?;
        let found: ClientFile = serde_json::from_slice(&text).map_err(|error| unusable(path, &chain(&error)))?;
        let from = path.display().to_string();
        self.add(
            Some((found.server, from.clone())),
            Some((found.ca, from.clone())),
            Some((found.token_file, from)),
        );
        Ok(true)
    }
}

/// Finds the server, and the token to ask it with. `env` gives environment variables.
pub(crate) fn locate(flags: &Flags, env: impl Fn(&str) -> Option<OsString>) -> Result<Server, Failure> {
    let project = chosen_project(flags, &env)?;
    open(look(flags, env)?, project)
}

/// Finds the server, for who has no token yet.
pub(crate) fn locate_to_log_in(flags: &Flags, env: impl Fn(&str) -> Option<OsString>) -> Result<Server, Failure> {
    let mut parts = look(flags, env)?;
    parts.token_file = None;
    parts.logs_in = true;
    open(parts, None)
}

/// Where `godwit login` keeps what it has: the directory, and in it the client file and the token.
pub(crate) fn login_files(env: impl Fn(&str) -> Option<OsString>) -> Option<(PathBuf, PathBuf, PathBuf)> {
    let directory = config(&env)?;
    Some((
        directory.clone(),
        directory.join("login.json"),
        directory.join("session.token"),
    ))
}

fn config(env: &impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let text = |name: &str| env(name).filter(|value| !value.is_empty());
    let config = text("XDG_CONFIG_HOME").map(PathBuf::from);
    let config = config.or_else(|| text("HOME").map(|home| PathBuf::from(home).join(".config")));
    config.map(|config| config.join("godwit"))
}

fn chosen_project(flags: &Flags, env: &impl Fn(&str) -> Option<OsString>) -> Result<Option<Reference>, Failure> {
    if flags.project.is_some() {
        return Ok(flags.project.clone());
    }
    let Some(text) = env("GODWIT_PROJECT").filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let project = text.to_str().and_then(|text| text.parse().ok());
    let wrong = || Failure::new(Exit::Usage, "GODWIT_PROJECT is not the name or id of a project").hint("unset it");
    project.map(Some).ok_or_else(wrong)
}

fn look(flags: &Flags, env: impl Fn(&str) -> Option<OsString>) -> Result<Parts, Failure> {
    let mut parts = Parts::default();
    parts.add(
        flags.server.clone().map(|server| (server, "--server".to_owned())),
        flags.ca.clone().map(|ca| (ca, "--ca".to_owned())),
        flags.token_file.clone().map(|file| (file, "--token-file".to_owned())),
    );
    if let Some(state) = &flags.state {
        add_state(&mut parts, state)?;
    }
    let text = |name: &str| env(name).filter(|value| !value.is_empty());
    let path = |name: &str| text(name).map(|value| (PathBuf::from(value), name.to_owned()));
    let server = text("GODWIT_SERVER").map(OsString::into_string).transpose();
    let server = server.map_err(|_| {
        Failure::new(Exit::Usage, "GODWIT_SERVER is not UTF-8").hint("give https://HOST:PORT, or unset it")
    })?;
    parts.add(
        server.map(|server| (server, "GODWIT_SERVER".to_owned())),
        path("GODWIT_CA"),
        path("GODWIT_TOKEN_FILE"),
    );
    let config = config(&env);
    let files = [
        config.as_ref().map(|config| config.join("login.json")),
        config.map(|config| config.join("client.json")),
        Some("/var/lib/godwit/controller/client.json".into()),
    ];
    for file in files.into_iter().flatten() {
        if parts.is_whole() || (parts.add_file(&file)? && parts.is_whole()) {
            break;
        }
    }
    Ok(parts)
}

fn open(parts: Parts, project: Option<Reference>) -> Result<Server, Failure> {
    let token = match parts.token_file {
        Some(file) => Some(Some(file)),
        None => parts.logs_in.then_some(None),
    };
    let (Some(server), Some(ca), Some(token)) = (parts.server, parts.ca, token) else {
        let message = format!(
            "no server is known; looked for --server, --ca and --token-file, GODWIT_SERVER, GODWIT_CA and GODWIT_TOKEN_FILE, and in: {}",
            parts.looked.join(", ")
        );
        return Err(Failure::new(Exit::Unreachable, message)
            .hint("start one here with `godwit up`, give --state DIR of one that runs here, or log in: `godwit login --server ... --ca ...`"));
    };
    let address = address(&server.0).map_err(|why| {
        Failure::new(Exit::Usage, format!("the server's address from {}: {why}", server.1))
            .hint("give https://HOST:PORT")
    })?;
    let mut pem = Vec::new();
    let opened = std::fs::File::open(&ca.0).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut pem));
    opened.map_err(|error| unusable(&ca.0, &chain(&error)))?;
    let authority = CaCertificate::from_pem(&pem).map_err(|error| unusable(&ca.0, &chain(&error)))?;
    let token_from = token
        .as_ref()
        .map(|(file, _)| file.display().to_string())
        .unwrap_or_default();
    let read = |(file, _): (PathBuf, String)| {
        ApiToken::read_file(&file).map_err(|error| {
            Failure::of(Exit::Failed, &error).hint("give a token file of your own with --token-file, mode 0600")
        })
    };
    let token = token.map(read).transpose()?;
    Ok(Server {
        address,
        address_from: server.1,
        authority,
        authority_from: ca.0.display().to_string(),
        token,
        token_from,
        project,
    })
}

/// Adds what the server has that keeps its state in this directory. Who names one means that one, and no other.
fn add_state(parts: &mut Parts, state: &Path) -> Result<(), Failure> {
    for file in ["client.json", "controller/client.json"].map(|file| state.join(file)) {
        if parts.add_file(&file)? {
            return Ok(());
        }
        let unread = std::fs::File::open(&file).err();
        if unread.is_some_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied) {
            let message = format!("this user may not read {}", file.display());
            return Err(
                Failure::new(Exit::Failed, message).hint("run as the user of that server, or log in: `godwit login`")
            );
        }
    }
    let message = match state.is_dir() {
        true => format!("no server keeps its state in {}", state.display()),
        false => format!(
            "no server keeps its state in {}: there is no such directory",
            state.display()
        ),
    };
    Err(Failure::new(Exit::Unreachable, message).hint(
        "give --state the directory of a controller on this machine; or leave it out, or name a server with --server",
    ))
}

/// Neither the file, nor perhaps the directory that it would be in.
fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

fn address(text: &str) -> Result<Address, String> {
    let bare = match text.split_once("://") {
        Some(("https", bare)) => bare.strip_suffix('/').unwrap_or(bare),
        Some(_) => return Err("only https is spoken".to_owned()),
        None => text,
    };
    bare.parse()
        .or_else(|first: identity::AddressError| format!("{bare}:{PORT}").parse().map_err(|_| first.to_string()))
}

fn unusable(path: &Path, why: &str) -> Failure {
    Failure::new(Exit::Failed, format!("cannot use {}: {why}", path.display())).hint("check the file, or name another")
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _};

    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            let authority = identity::ClusterAuthority::create(
                &place.path("ca"),
                uuid::Uuid::from_u128(1),
                std::time::SystemTime::now(),
            );
            std::fs::write(place.path("ca.pem"), authority.unwrap().certificate().to_pem()).unwrap();
            ApiToken::generate().unwrap().create_file(&place.path("token")).unwrap();
            place
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn client_file(&self, at: &str, server: &str) {
            let file = ClientFile {
                server: server.to_owned(),
                ca: self.path("ca.pem"),
                token_file: self.path("token"),
            };
            let path = self.path(at);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, serde_json::to_vec(&file).unwrap()).unwrap();
        }

        fn locate(&self, flags: &Flags, env: &[(&str, PathBuf)]) -> Result<Server, Failure> {
            let mut env: BTreeMap<String, OsString> = env
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.clone().into()))
                .collect();
            env.entry("HOME".to_owned()).or_insert_with(|| self.path("home").into());
            locate(flags, |name| env.get(name).cloned())
        }
    }

    #[test]
    fn flags_go_before_a_state_directory_before_the_environment_before_files() {
        let place = Place::new();
        place.client_file("home/.config/godwit/client.json", "https://home:1");
        let mut flags = Flags::default();
        let home = place.locate(&flags, &[]).unwrap();
        assert_eq!(home.address.host, "home");
        let env = [("GODWIT_SERVER", PathBuf::from("https://env:1"))];
        assert_eq!(place.locate(&flags, &env).unwrap().address.host, "env");
        place.client_file("state/controller/client.json", "https://up:1");
        flags.state = Some(place.path("state"));
        assert_eq!(place.locate(&flags, &env).unwrap().address.host, "up");
        place.client_file("state/client.json", "https://state:1");
        assert_eq!(place.locate(&flags, &env).unwrap().address.host, "state");
        flags.server = Some("flag".to_owned());
        let found = place.locate(&flags, &env).unwrap();
        assert_eq!((found.address.host.as_str(), found.address.port), ("flag", PORT));
    }

    #[test]
    fn a_state_directory_that_is_named_is_binding() {
        let place = Place::new();
        place.client_file("home/.config/godwit/client.json", "https://home:1");
        let env = [
            ("GODWIT_SERVER", PathBuf::from("https://env:1")),
            ("GODWIT_CA", place.path("ca.pem")),
            ("GODWIT_TOKEN_FILE", place.path("token")),
        ];
        std::fs::create_dir(place.path("empty")).unwrap();
        // None, an empty one, and a file where the directory would be.
        for state in ["nowhere", "empty", "token"] {
            let flags = Flags {
                state: Some(place.path(state)),
                ..Flags::default()
            };
            for env in [&[][..], &env[..]] {
                let failure = place.locate(&flags, env).err().unwrap();
                assert_eq!(failure.exit(), Exit::Unreachable, "{failure:?}");
                assert!(
                    failure.message().starts_with("no server keeps its state in"),
                    "{failure:?}"
                );
            }
            let whole = Flags {
                server: Some("https://flag:1".to_owned()),
                ca: Some(place.path("ca.pem")),
                token_file: Some(place.path("token")),
                ..flags
            };
            assert!(place.locate(&whole, &[]).is_err(), "also where all else is named");
        }
    }

    #[test]
    fn a_variable_that_is_of_no_use_is_not_passed_over() {
        use std::os::unix::ffi::OsStringExt as _;
        let place = Place::new();
        place.client_file("home/.config/godwit/client.json", "https://home:1");
        let wrong = PathBuf::from(OsString::from_vec(vec![0xff]));
        for (name, value) in [
            ("GODWIT_SERVER", wrong),
            ("GODWIT_SERVER", "http://home:1".into()),
            ("GODWIT_CA", place.path("nowhere")),
            ("GODWIT_TOKEN_FILE", place.path("nowhere")),
        ] {
            assert!(place.locate(&Flags::default(), &[(name, value)]).is_err(), "{name}");
        }
    }

    #[test]
    fn a_token_file_that_others_can_read_is_refused() {
        let place = Place::new();
        place.client_file("state/client.json", "https://h:1");
        std::fs::set_permissions(place.path("token"), std::fs::Permissions::from_mode(0o644)).unwrap();
        let flags = Flags {
            state: Some(place.path("state")),
            ..Flags::default()
        };
        let failure = place.locate(&flags, &[]).err().unwrap();
        assert!(format!("{failure:?}").contains("open to other users"), "{failure:?}");
    }

    #[test]
    fn only_https_addresses_are_taken() {
        assert!(address("http://h:1").is_err());
        assert!(address("https://h:0").is_err());
        assert!(address("https://h/../x").is_err());
        assert_eq!(address("https://[::1]:7/").unwrap().to_string(), "[::1]:7");
        assert_eq!(address("10.0.0.1").unwrap().to_string(), format!("10.0.0.1:{PORT}"));
    }
}
