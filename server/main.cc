#include "server/commands.h"

int main(int argc, char** argv) { return linspec::RunCommand(argc, argv); }
