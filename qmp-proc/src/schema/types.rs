//! How types are declared. All of it is `static` data; types may refer to each other in circles.

/// A type.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// `null`.
    Null,
    /// A boolean.
    Bool,
    /// An integer.
    Int(IntType),
    /// Any number, as a double.
    Number,
    /// Text.
    Str,
    /// Anything.
    Any,
    /// A list.
    Array(&'static Self),
    /// One of some words.
    Enum(&'static EnumType),
    /// An object.
    Struct(&'static StructType),
    /// One of several types that differ in their JSON form.
    Alternate(&'static AlternateType),
}

/// The range of an integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntType {
    /// `i64`.
    Int,
    /// `u64`. A negative number is taken modulo 2⁶⁴, as servers always have.
    Size,
    /// A smaller range, and what errors call the type.
    Narrow {
        /// For instance `uint8_t`.
        name: &'static str,
        /// Smallest value.
        min: i64,
        /// Largest value.
        max: i64,
    },
}

/// Words.
#[derive(Debug)]
pub struct EnumType {
    /// The type's name, for the documentation.
    pub name: &'static str,
    /// The words.
    pub values: &'static [&'static str],
}

/// Members, and with a tag those of the variant that the tag names.
#[derive(Debug)]
pub struct StructType {
    /// The type's name, for the documentation.
    pub name: &'static str,
    /// The members that it always has, in the order in which they are checked.
    pub members: &'static [Member],
    /// The variants of a union.
    pub variants: Option<&'static Variants>,
}

/// Variants of a flat union: their members stand beside the common ones.
#[derive(Debug)]
pub struct Variants {
    /// The common member, of an enum type, that selects the variant.
    pub tag: &'static str,
    /// The tag's value and the variant's type. A value that is not listed has no further members.
    pub of: &'static [(&'static str, &'static StructType)],
}

/// A member of a struct, or an argument of a command.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// Whether it may be absent.
    pub optional: bool,
}

/// Types that differ in their JSON form.
#[derive(Debug)]
pub struct AlternateType {
    /// The type's name; errors quote it.
    pub name: &'static str,
    /// A name (for the documentation) and a type each.
    pub branches: &'static [(&'static str, Type)],
}

/// A command.
#[derive(Debug)]
pub struct CommandType {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: &'static StructType,
    /// What it returns; [`NOTHING`] is `{}`.
    pub returns: Type,
    /// Who carries it out.
    pub run: Run,
    /// Whether it may be executed out of band.
    pub allow_oob: bool,
}

/// Who carries a command out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// This process.
    Here(Local),
    /// The supervisor.
    Supervisor,
    /// The supervisor, but this process reads the text of the command and writes that of the answer.
    Human,
}

/// The commands that this process carries out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    /// qmp_capabilities.
    Capabilities,
    /// query-version.
    Version,
    /// query-commands.
    Commands,
    /// query-qmp-schema.
    Schema,
}

/// An event.
#[derive(Debug)]
pub struct EventType {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: &'static StructType,
}

/// No members.
pub static EMPTY: StructType = StructType {
    name: "Empty",
    members: &[],
    variants: None,
};

/// The type of a command that returns no data.
pub const NOTHING: Type = Type::Struct(&EMPTY);

/// The full range of `i64`.
pub const INT: Type = Type::Int(IntType::Int);

/// A mandatory member.
pub const fn required(name: &'static str, ty: Type) -> Member {
    Member {
        name,
        ty,
        optional: false,
    }
}

/// An optional member.
pub const fn optional(name: &'static str, ty: Type) -> Member {
    Member {
        name,
        ty,
        optional: true,
    }
}

/// An enum type.
pub const fn enumeration(name: &'static str, values: &'static [&'static str]) -> EnumType {
    EnumType { name, values }
}

/// A struct type without variants.
pub const fn structure(name: &'static str, members: &'static [Member]) -> StructType {
    StructType {
        name,
        members,
        variants: None,
    }
}

/// A command that the supervisor carries out.
pub const fn supervised(name: &'static str, arguments: &'static StructType, returns: Type) -> CommandType {
    CommandType {
        name,
        arguments,
        returns,
        run: Run::Supervisor,
        allow_oob: false,
    }
}

/// A command that this process carries out.
pub const fn local(name: &'static str, arguments: &'static StructType, returns: Type, run: Local) -> CommandType {
    CommandType {
        name,
        arguments,
        returns,
        run: Run::Here(run),
        allow_oob: false,
    }
}
