// Asks the HTTP API for a code, with nothing but Go, and prints the reply.
//
//	go run ask.go a@example.com
//
// API_KEY is a key of the API, where it asks for one.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

type reply struct {
	Error *int   `json:"error"` // a pointer, so that an answer without it is not taken for 0
	Email string `json:"email"`
}

func ask(api, email string) (given reply, err error) {
	body, err := json.Marshal(map[string]string{"email": email})
	if err != nil {
		return given, err
	}
	client := http.Client{Timeout: 10 * time.Second} // the API answers within VERIFY_REPLY_TIMEOUT (5 s)
	request, err := http.NewRequest("POST", api+"/get_varifycode", bytes.NewReader(body))
	if err != nil {
		return given, err
	}
	request.Header.Set("Content-Type", "application/json")
	if key := os.Getenv("API_KEY"); key != "" {
		request.Header.Set("Authorization", "Bearer "+key)
	}
	answer, err := client.Do(request)
	if err != nil {
		return given, err
	}
	defer answer.Body.Close()
	return given, json.NewDecoder(answer.Body).Decode(&given)
}

func main() {
	log.SetFlags(0)
	api := os.Getenv("HTTP_API")
	if api == "" {
		api = "http://127.0.0.1:8081"
	}
	given, err := ask(api, os.Args[1])
	if err != nil {
		log.Fatal("no reply: ", err)
	}
	said, _ := json.Marshal(given)
	fmt.Println(string(said))
	if given.Error == nil || *given.Error != 0 {
		os.Exit(1)
	}
}
